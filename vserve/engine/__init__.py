"""The engine, on a thread of its own: which tokens are computed when, and what is drawn.

The policy half (request, inbox, pages, prefix, sequence, limits, places, planner, scheduler) decides and never sees a
tensor; the device half (batch, sampler, runner, loop) computes and never decides.  Neither knows of sockets, text or
JSON.
"""
