"""Serving: everything between a client's HTTP connection and the actors of the cluster.

The life of a request:

    HAProxy                   takes the connection, and checks headers and limits     launch/haproxy_config.py
    Guard                     checks the key and the caller's address                 api/guard.py
    Bodies.read               reads, decodes and validates the JSON body              bodies/bodies.py, schema.py
    Service.render_chat       makes a prompt of the messages by the chat template     text/prompts.py
    sampling_params           joins the request's fields with the model's defaults    api/sampling.py
    Service.answers, run      takes places in the queue, and begins the answers       api/service.py
    EngineClient.generate     sends a GenerateRequest to the engine                   backend/engine_client.py
    actors/engine             schedules it; workers run its steps; tokens come back
    Answer.feed               turns tokens into text, and looks for stop strings      generation/answer.py
    Run.respond               writes the response, or an event for each piece         api/responses.py

The rooms: `launch` starts and ends a server's processes, `api` owns routes and responses, `bodies` request bodies,
`text` the tokenizer and chat templates, `structured` the grammars of answers, `parsing` reasoning and tool calls,
`tools` how a chat uses both, `backend` the way to the engine and back, `generation` answers,
`responses` stored and background responses, `web` what browsers, proxies and tools need, `joined` what the nodes of a
cluster need, `cli` the command `emoe`.
`models` holds the built-in model, `page` the start page and `grafana` a dashboard.
"""
