"""The shapes of what the server answers, each once, by name: JSON Schemas (2020-12) for /openapi.json and the tests.

The bytes themselves are worded by the endpoints; tests hold each endpoint's replies against its shape here.
"""

from __future__ import annotations

from typing import Final

from vserve.api.fields import Schema, or_null

STRING: Final[Schema] = {"type": "string"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
NUMBER: Final[Schema] = {"type": "number"}
BOOL: Final[Schema] = {"type": "boolean"}
ANY_OBJECT: Final[Schema] = {"type": "object"}


def ref(name: str) -> Schema:
    """A reference to the schema of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(fields: Schema, optional: Schema | None = None) -> Schema:
    """An object that has all of fields and may have those of optional."""
    return {"type": "object", "properties": {**fields, **(optional or {})}, "required": list(fields)}


def many(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def const(value: str) -> Schema:
    """Always this string."""
    return {"type": "string", "const": value}


def one_of(*values: str) -> Schema:
    """One of these strings."""
    return {"type": "string", "enum": list(values)}


_FINISH = one_of("stop", "length", "tool_calls", "abort", "error")
_STOP_REASON: Schema = {"type": ["string", "integer", "null"]}
_IDS = many(COUNT)
_MS: Schema = {"type": "number", "description": "milliseconds"}
_HEAD: Schema = {"id": STRING, "created": COUNT, "model": STRING, "system_fingerprint": STRING}
_TOKEN: Schema = {"token": STRING, "logprob": NUMBER, "bytes": many(COUNT)}
_CALL = record({"id": STRING, "type": const("function"), "function": record({"name": STRING, "arguments": STRING})})
_CALL_DELTA = record(
    {"index": COUNT},
    {"id": STRING, "type": const("function"), "function": record({}, {"name": STRING, "arguments": STRING})},
)
_REASONING: Schema = {"reasoning": or_null(STRING), "reasoning_content": or_null(STRING)}
_PROBE: Schema = record(
    {"status": STRING, "phase": STRING, "progress": or_null(NUMBER), "heartbeat_age_s": or_null(NUMBER)},
    {
        "reason": or_null(STRING),
        "running": COUNT,
        "waiting": COUNT,
        "embedding_heartbeat_age_s": NUMBER,
        "embedding_reason": or_null(STRING),
        "embedding_requests": COUNT,
    },
)

_BLOCK: Schema = {
    "anyOf": [
        record({"type": const("text"), "text": STRING}),
        record({"type": const("thinking"), "thinking": STRING, "signature": STRING}),
        record({"type": const("tool_use"), "id": STRING, "name": STRING, "input": ANY_OBJECT}),
    ]
}
_DELTA: Schema = {
    "anyOf": [
        record({"type": const("text_delta"), "text": STRING}),
        record({"type": const("thinking_delta"), "thinking": STRING}),
        record({"type": const("input_json_delta"), "partial_json": STRING}),
    ]
}
_STOP = or_null(one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"))
_STOPPED: Schema = {"stop_reason": _STOP, "stop_sequence": or_null(STRING)}
_MESSAGE_EVENTS: list[Schema] = [
    record({"type": const("message_start"), "message": ref("Message")}),
    record({"type": const("ping")}),
    record({"type": const("content_block_start"), "index": COUNT, "content_block": _BLOCK}),
    record({"type": const("content_block_delta"), "index": COUNT, "delta": _DELTA}),
    record({"type": const("content_block_stop"), "index": COUNT}),
    record({"type": const("message_delta"), "delta": record(_STOPPED), "usage": ref("MessageUsage")}),
    record({"type": const("message_stop")}),
    ref("MessagesError"),
]

_RUN = one_of("in_progress", "completed", "incomplete")
_TOP = record({"token": STRING, "logprob": NUMBER})
_BRIEF = many(record({"token": STRING, "logprob": NUMBER, "top_logprobs": many(_TOP)}))
_TEXT_PART = record(
    {
        "type": const("output_text"),
        "text": STRING,
        "annotations": many(ANY_OBJECT),
        "logprobs": many(record({**_TOKEN, "top_logprobs": many(record(_TOKEN))})),
    }
)
_THOUGHT_PART = record({"type": const("reasoning_text"), "text": STRING})
_OUTPUT_ITEM: Schema = {
    "anyOf": [
        record(
            {
                "id": STRING,
                "type": const("message"),
                "role": const("assistant"),
                "status": _RUN,
                "content": many(_TEXT_PART),
            }
        ),
        record(
            {
                "id": STRING,
                "type": const("reasoning"),
                "status": _RUN,
                "summary": many(ANY_OBJECT),
                "content": many(_THOUGHT_PART),
            }
        ),
        record(
            {
                "id": STRING,
                "type": const("function_call"),
                "status": _RUN,
                "call_id": STRING,
                "name": STRING,
                "arguments": STRING,
            }
        ),
    ]
}
_INPUT_PARTS: Schema = {"anyOf": [STRING, many(ANY_OBJECT)]}
_INPUT_ITEM = record(
    {"id": STRING, "type": one_of("message", "reasoning", "function_call", "function_call_output")},
    {
        "role": one_of("user", "assistant", "system", "developer"),
        "status": _RUN,
        "content": {"anyOf": [many(ANY_OBJECT), {"type": "null"}]},
        "summary": many(ANY_OBJECT),
        "call_id": STRING,
        "name": STRING,
        "arguments": STRING,
        "output": _INPUT_PARTS,
    },
)


def _response_event(kind: str, fields: Schema) -> Schema:
    return record({"type": const(f"response.{kind}"), "sequence_number": COUNT, **fields})


_AT: Schema = {"item_id": STRING, "output_index": COUNT}
_AT_PART: Schema = {**_AT, "content_index": COUNT}
_PART: Schema = {"part": {"anyOf": [_TEXT_PART, _THOUGHT_PART]}}
_RESPONSE_EVENTS: list[Schema] = [
    *(
        _response_event(kind, {"response": ref("Response")})
        for kind in ("created", "queued", "in_progress", "completed", "failed", "incomplete")
    ),
    _response_event("output_item.added", {"output_index": COUNT, "item": _OUTPUT_ITEM}),
    _response_event("output_item.done", {"output_index": COUNT, "item": _OUTPUT_ITEM}),
    _response_event("content_part.added", {**_AT_PART, **_PART}),
    _response_event("content_part.done", {**_AT_PART, **_PART}),
    _response_event("output_text.delta", {**_AT_PART, "delta": STRING, "logprobs": _BRIEF}),
    _response_event("output_text.done", {**_AT_PART, "text": STRING, "logprobs": _BRIEF}),
    _response_event("reasoning_text.delta", {**_AT_PART, "delta": STRING}),
    _response_event("reasoning_text.done", {**_AT_PART, "text": STRING}),
    _response_event("function_call_arguments.delta", {**_AT, "delta": STRING}),
    _response_event("function_call_arguments.done", {**_AT, "name": STRING, "arguments": STRING}),
]

SCHEMAS: Final[dict[str, Schema]] = {
    "Error": record(
        {
            "error": record(
                {
                    "message": STRING,
                    "type": STRING,
                    "param": {**or_null(STRING), "description": "the field, where there is one"},
                    "code": {"type": "integer", "description": "the HTTP status"},
                }
            )
        }
    ),
    "Health": _PROBE,
    "Version": record({"version": STRING}),
    "Load": record(
        {"server_load": COUNT, "queue_size": COUNT, "active_workers": COUNT, "gpu_utilization": NUMBER},
        {
            "running": COUNT,
            "waiting": COUNT,
            "kv_cache_usage": NUMBER,
            "kv_blocks_held": COUNT,
            "kv_blocks_total": COUNT,
            "embedding_requests": COUNT,
            "embedding_tokens": COUNT,
        },
    ),
    "Model": record(
        {
            "id": STRING,
            "object": const("model"),
            "created": COUNT,
            "owned_by": STRING,
            "root": STRING,
            "parent": {"type": "null"},
            "max_model_len": COUNT,
            "permission": many(ANY_OBJECT),
        }
    ),
    "ModelList": record({"object": const("list"), "data": many(ref("Model"))}),
    "Usage": record(
        {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
        {
            "prompt_tokens_details": record({"cached_tokens": COUNT}),
            "completion_tokens_details": record({}, {"reasoning_tokens": COUNT}),
        },
    ),
    "ChatLogprobs": record(
        {"content": many(record({**_TOKEN, "top_logprobs": many(record(_TOKEN))})), "refusal": {"type": "null"}}
    ),
    "ChatCompletion": record(
        {
            **_HEAD,
            "object": const("chat.completion"),
            "choices": many(
                record(
                    {
                        "index": COUNT,
                        "message": record(
                            {
                                "role": const("assistant"),
                                "content": or_null(STRING),
                                "refusal": {"type": "null"},
                                **_REASONING,
                            },
                            {"tool_calls": many(_CALL)},
                        ),
                        "logprobs": or_null(ref("ChatLogprobs")),
                        "finish_reason": or_null(_FINISH),
                        "stop_reason": _STOP_REASON,
                    },
                    {"token_ids": _IDS},
                )
            ),
            "usage": ref("Usage"),
        },
        {"prompt_token_ids": _IDS, "prompt_logprobs": {}},
    ),
    "ChatCompletionChunk": record(
        {
            **_HEAD,
            "object": const("chat.completion.chunk"),
            "choices": many(
                record(
                    {
                        "index": COUNT,
                        "delta": record(
                            {},
                            {
                                "role": const("assistant"),
                                "content": or_null(STRING),
                                **_REASONING,
                                "tool_calls": many(_CALL_DELTA),
                            },
                        ),
                        "logprobs": or_null(ref("ChatLogprobs")),
                        "finish_reason": or_null(_FINISH),
                    },
                    {"stop_reason": _STOP_REASON, "token_ids": _IDS},
                )
            ),
        },
        {"usage": or_null(ref("Usage")), "prompt_token_ids": _IDS, "prompt_logprobs": {}},
    ),
    "CompletionLogprobs": record(
        {
            "text_offset": many(COUNT),
            "token_logprobs": many(or_null(NUMBER)),
            "tokens": many(STRING),
            "top_logprobs": many(or_null({"type": "object", "additionalProperties": NUMBER})),
        }
    ),
    "Completion": record(
        {
            **_HEAD,
            "object": const("text_completion"),
            "choices": many(
                record(
                    {
                        "index": COUNT,
                        "text": STRING,
                        "logprobs": or_null(ref("CompletionLogprobs")),
                        "finish_reason": or_null(_FINISH),
                        "stop_reason": _STOP_REASON,
                    },
                    {"token_ids": _IDS, "prompt_token_ids": _IDS, "prompt_logprobs": {}},
                )
            ),
        },
        {"usage": or_null(ref("Usage"))},
    ),
    "TokenizedText": record(
        {"tokens": _IDS, "count": COUNT, "max_model_len": COUNT, "token_strs": or_null(many(STRING))}
    ),
    "Tokenized": {"anyOf": [ref("TokenizedText"), many(ref("TokenizedText"))]},
    "Detokenized": record({"text": STRING, "prompt": STRING}),
    "MessagesError": record(
        {"type": const("error"), "error": record({"type": STRING, "message": STRING}), "request_id": STRING}
    ),
    "MessageUsage": record(
        {
            "input_tokens": {**COUNT, "description": "those that were not cached"},
            "cache_creation_input_tokens": COUNT,
            "cache_read_input_tokens": COUNT,
            "output_tokens": COUNT,
        }
    ),
    "Message": record(
        {
            "id": STRING,
            "type": const("message"),
            "role": const("assistant"),
            "model": STRING,
            "content": many(_BLOCK),
            **_STOPPED,
            "usage": ref("MessageUsage"),
        }
    ),
    "MessageEvent": {"anyOf": list(_MESSAGE_EVENTS)},
    "TokenCount": record({"input_tokens": COUNT}),
    "RenderedPrompt": record(
        {"prompt": STRING, "token_ids": _IDS, "token_strs": many(STRING), "count": COUNT, "max_model_len": COUNT}
    ),
    "Rendered": {"anyOf": [ref("RenderedPrompt"), many(ref("RenderedPrompt"))]},
    "EncoderUsage": record({"prompt_tokens": COUNT, "total_tokens": COUNT}),
    "EmbeddingList": record(
        {
            "id": STRING,
            "object": const("list"),
            "created": COUNT,
            "model": STRING,
            "data": many(
                record(
                    {
                        "object": const("embedding"),
                        "index": COUNT,
                        "embedding": {
                            "anyOf": [many(NUMBER), STRING],
                            "description": "numbers, or float32 little-endian as base64",
                        },
                    }
                )
            ),
            "usage": ref("EncoderUsage"),
        }
    ),
    "ScoreList": record(
        {
            "id": STRING,
            "object": const("list"),
            "created": COUNT,
            "model": STRING,
            "data": many(record({"index": COUNT, "object": const("score"), "score": NUMBER})),
            "usage": ref("EncoderUsage"),
        }
    ),
    "Ranking": record(
        {
            "id": STRING,
            "model": STRING,
            "usage": ref("EncoderUsage"),
            "results": many(
                record({"index": COUNT, "relevance_score": NUMBER}, {"document": record({"text": STRING})})
            ),
        }
    ),
    "ResponseUsage": record(
        {
            "input_tokens": COUNT,
            "input_tokens_details": record({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
            "output_tokens": COUNT,
            "output_tokens_details": record({"reasoning_tokens": COUNT}),
            "total_tokens": COUNT,
        }
    ),
    "Response": record(
        {
            "id": STRING,
            "object": const("response"),
            "created_at": COUNT,
            "status": one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
            "completed_at": or_null(COUNT),
            "error": or_null(record({"code": STRING, "message": STRING})),
            "incomplete_details": or_null(record({"reason": const("max_output_tokens")})),
            "model": STRING,
            "output": many(_OUTPUT_ITEM),
            "usage": or_null(ref("ResponseUsage")),
            "temperature": NUMBER,
            "top_p": NUMBER,
            "background": BOOL,
            "instructions": or_null(STRING),
            "max_output_tokens": or_null(COUNT),
            "max_tool_calls": {"type": "null"},
            "metadata": {"type": "object", "additionalProperties": STRING},
            "parallel_tool_calls": BOOL,
            "previous_response_id": or_null(STRING),
            "prompt_cache_key": or_null(STRING),
            "reasoning": record({"effort": or_null(STRING), "summary": {"type": "null"}}),
            "safety_identifier": or_null(STRING),
            "service_tier": const("default"),
            "store": BOOL,
            "text": record({"format": ANY_OBJECT, "verbosity": STRING}),
            "tool_choice": {"anyOf": [STRING, ANY_OBJECT]},
            "tools": many(ANY_OBJECT),
            "top_logprobs": COUNT,
            "truncation": one_of("disabled", "auto"),
            "user": or_null(STRING),
        }
    ),
    "ResponseEvent": {"anyOf": list(_RESPONSE_EVENTS)},
    "ResponseDeleted": record({"id": STRING, "object": const("response"), "deleted": BOOL}),
    "ResponseItems": record(
        {
            "object": const("list"),
            "data": many(_INPUT_ITEM),
            "first_id": or_null(STRING),
            "last_id": or_null(STRING),
            "has_more": BOOL,
        }
    ),
    "Invocation": {"anyOf": [ref("ChatCompletion"), ref("Completion"), ref("EmbeddingList")]},
    "InvocationEvent": {"anyOf": [ref("ChatCompletionChunk"), ref("Completion")]},
    "Scaled": record({"message": STRING, "data_parallel_size": COUNT}),
    "Scaling": record(
        {
            "is_scaling_elastic_ep": BOOL,
            "phase": one_of("idle", "draining", "resizing"),
            "data_parallel_size": COUNT,
            "requested_data_parallel_size": or_null(COUNT),
            "error": or_null(STRING),
        }
    ),
    "DebugVersion": record(
        {
            "version": STRING,
            "git_hash": or_null(STRING),
            "cuda_version": or_null(STRING),
            "torch_version": or_null(STRING),
            "python_version": STRING,
            "device": or_null(STRING),
            "platform": STRING,
        }
    ),
    "DebugStats": record(
        {
            "num_running_requests": COUNT,
            "num_waiting_requests": COUNT,
            "num_swapped_requests": COUNT,
            "gpu_cache_usage": NUMBER,
            "cpu_cache_usage": NUMBER,
            "avg_prompt_throughput": {**NUMBER, "description": "tokens a second over about ten seconds"},
            "avg_generation_throughput": {**NUMBER, "description": "tokens a second over about ten seconds"},
            "num_open_replies": COUNT,
            "num_preemptions": COUNT,
            "num_finished": COUNT,
            "num_aborted": COUNT,
            "num_steps": COUNT,
            "utilization": NUMBER,
            "prompt_tokens": COUNT,
            "generation_tokens": COUNT,
        }
    ),
    "DebugCache": record(
        {
            "num_free_gpu_blocks": COUNT,
            "num_used_gpu_blocks": COUNT,
            "gpu_cache_percent": NUMBER,
            "num_free_cpu_blocks": COUNT,
            "num_used_cpu_blocks": COUNT,
            "num_cached_blocks": COUNT,
            "prefix_cache_queries": COUNT,
            "prefix_cache_hits": COUNT,
            "prefix_cache_hit_rate": or_null(NUMBER),
        }
    ),
    "DebugTrace": record(
        {
            "id": STRING,
            "reply_id": or_null(STRING),
            "trace_id": STRING,
            "span_id": STRING,
            "parent_span_id": or_null(STRING),
            "route": STRING,
            "method": STRING,
            "model": or_null(STRING),
            "stream": BOOL,
            "n": COUNT,
            "max_tokens": or_null(COUNT),
            "temperature": or_null(NUMBER),
            "top_p": or_null(NUMBER),
            "received": {**NUMBER, "description": "Unix seconds; times in ms count from here"},
            "admitted_ms": _MS,
            "tokenised_ms": or_null(_MS),
            "queued_ms": or_null(_MS),
            "first_scheduled_ms": or_null(_MS),
            "first_token_ms": or_null(_MS),
            "ended_ms": or_null(_MS),
            "status": or_null({"type": "integer"}),
            "client_gone": BOOL,
            "bytes_written": COUNT,
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "choices": many(ref("DebugChoice")),
            "choices_left_out": COUNT,
        }
    ),
    "DebugChoice": record(
        {
            "id": COUNT,
            "index": COUNT,
            "prompt_tokens": COUNT,
            "cached_tokens": COUNT,
            "completion_tokens": COUNT,
            "queued_ms": or_null(_MS),
            "first_scheduled_ms": or_null(_MS),
            "prefill": many(record({"step": COUNT, "at_ms": _MS, "start": COUNT, "tokens": COUNT})),
            "prefill_left_out": COUNT,
            "first_token_ms": or_null(_MS),
            "gaps": record({"count": COUNT}, {"p50_ms": _MS, "p99_ms": _MS, "max_ms": _MS}),
            "preemptions": COUNT,
            "preempted_ms": many(_MS),
            "finish_reason": or_null(STRING),
            "ended_ms": or_null(_MS),
        }
    ),
    "ChromeTraces": record(
        {
            "displayTimeUnit": const("ms"),
            "traceEvents": many(
                record(
                    {"name": STRING, "ph": one_of("X", "i", "M"), "ts": NUMBER, "pid": COUNT, "tid": COUNT},
                    {"dur": NUMBER, "cat": STRING, "s": const("t"), "args": ANY_OBJECT},
                )
            ),
        }
    ),
    "DebugTraces": {
        "anyOf": [
            record({"traces": many(ref("DebugTrace")), "ring": record({"kept": COUNT, "pushed_out": COUNT})}),
            ref("ChromeTraces"),
        ]
    },
    "DebugConfig": record(
        {
            "model_name": or_null(STRING),
            "max_model_len": or_null(COUNT),
            "embedding_model_name": or_null(STRING),
            "num_gpu_blocks": COUNT,
            "swap_space_bytes": COUNT,
        }
    ),
    "OpenApi": record(
        {"openapi": STRING, "info": ANY_OBJECT, "paths": ANY_OBJECT, "components": ANY_OBJECT},
        {"servers": many(ANY_OBJECT), "tags": many(ANY_OBJECT)},
    ),
}
