"""What the server promises, one line each.  Tests name what they hold it to: @pytest.mark.promise("R1", "fault: ...").

tests/test_promises.py fails while a line has no test.  A new promise is a new line here, and a test that names it.
"""

from __future__ import annotations

PROMISES: dict[str, str] = {
    "R1": "An accepted request ends exactly once: a whole answer, or an error that the client sees.",
    "R2": "A client that is gone frees its pages, rows and tasks, and is counted as an abort.",
    "R3": "Overload is refused early, with Retry-After, before a body is read; probes are answered meanwhile.",
    "R4": "Deadlines are kept, in the queue and in a stream.",
    "R5": "Health tells the truth: of a dead, hung, idle, busy and starting engine.",
    "R6": "Drain is clean: what runs ends whole, newcomers are told, a second signal stops at once, exit code 0.",
    "R7": "One bad request harms only itself; texts do not depend on their neighbours.",
    "R8": "Memory is bounded: every buffer, store, queue and label set.",
    "R9": "Slow peers cost nothing: every wait has a timeout, every buffer a bound.",
    "R10": "Nothing desyncs: what the parser refuses closes the connection, answers keep their order.",
    "R11": "Stored responses survive and stay private.",
    "R12": "No one gets in and nothing leaks: one guard by route, no key or prompt in any text we write.",
    "R13": "Untrusted model files cannot run code, exhaust memory or kill the process silently.",
    "R14": "Restart is quick: after kill -9 the port binds at once.",
    # Faults that are injected.
    "fault: exception in the step loop": "in plan, launch, wait, commit and publish",
    "fault: hang in the step loop": "the same places; with and without --exit-on-stall",
    "fault: slow step": "a hundred times as long as usual",
    "fault: invalid numbers": "NaN and infinite logits",
    "fault: four pages": "a KV cache too small for its requests",
    "fault: full inbox": "more requests and tokens than may wait",
    "fault: tokenizer raises": "",
    "fault: endless template": "a chat template that loops for ever or grows without end",
    "fault: exploding grammar": "a schema or regular expression whose automaton explodes",
    "fault: disconnect anywhere": "at a random byte of request and response",
    "fault: RST between chunks": "",
    "fault: half-open sockets": "",
    "fault: slow readers": "one byte at a time",
    "fault: slow writers": "heads and bodies that drip",
    "fault: idle connections": "2,000 of them",
    "fault: no descriptors": "accept at the limit of descriptors",
    "fault: signals under load": "SIGTERM, SIGINT, SIGHUP",
    "fault: stopped process": "SIGSTOP and SIGCONT",
    "fault: wall clock": "set back and forward",
    "fault: disk full": "the store's disk is full or read-only",
    "fault: corrupt store": "the store's file is damaged",
    "fault: TLS garbage": "a handshake that is none",
    "fault: port in use": "",
    "fault: hostile model files": "cut, bit-flipped and made up: safetensors, GGUF, tokenizer.json, config.json",
    "fault: garbage on reload": "certificate and key files replaced by garbage",
    "fault: GPU out of memory": "at start and in a step",
    "fault: GPU lost": "an error of the device in a step",
    # Input that has hurt others.
    "input: huge counts": "n, best_of, top_logprobs, max_tokens, lists of prompts",
    "input: paths in Host": "a guard that sees another path than the router",
    "input: odd digits": "sizes with signs, underscores, spaces, digits of other scripts",
    "input: huge anything": "header, target, body, nesting, numbers, NaN literals, lone surrogates",
    "input: numbers of no range": "NaN and infinite parameters, min_tokens above max_tokens",
    "input: exploding schema": "thousands of properties, recursion, unsupported keywords",
    "input: template from the request": "code or loops by chat_template and its variables",
    "input: backtracking": "regular expressions over text of the model or of users",
    "input: odd token ids": "out of range, negative, floats, booleans; empty prompts",
    "input: image URLs": "nothing is fetched",
    "input: huge lists": "logit_bias, stop, bad_words",
    "input: ids chosen by clients": "echoed, never used as keys",
    "input: odd metric labels": "methods and paths that no route knows",
    "input: pickled weights": "and remote code and names that leave their folder",
    "input: long echoes": "an error that repeats a megabyte, a stack or an address",
    "input: control characters": "in logs and pages",
    "input: other tenants' prefixes": "the time of a cache hit tells nothing across keys",
    "input: side doors": "routes without the guard",
}

AWAITED: dict[str, str] = {
    "fault: exploding grammar": "vserve/text/grammar.py",
    "input: exploding schema": "vserve/text/grammar.py",
}
"""Promises about a part: they count from the moment that its module is there."""
