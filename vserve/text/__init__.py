"""Words and token ids: tokenizer, chat template, incremental decoding, stop strings.

Everything here takes values and returns values, on any thread.  It knows nothing of HTTP, of the engine or of torch.
"""
