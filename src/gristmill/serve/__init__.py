"""The endpoint: an OpenAI-compatible server over one engine, for the clients that people have already.

`schema.py` says what may be asked for, `worker.py` gives it to the engine's thread, `answers.py` says what is answered,
`routes.py` and `app.py` put HTTP around them, `server.py` the process. May use inference, hub and the tokenizer. What a
client sends is data: it can be refused, and never stops the server, opens a file or becomes a control token.
"""
