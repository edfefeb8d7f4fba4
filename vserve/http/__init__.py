"""The wire half of the server: bytes, not tokens.

A strict sans-IO HTTP/1.1 parser, the connection state table and an asyncio server around them.  It knows routes and
replies, and must never see the engine, the models, the API's JSON or torch.
"""
