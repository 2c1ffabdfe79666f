"""The HTTP API: routes, keys, limits and the form of responses.

app              the FastAPI application: all routers, /health, /ready, /metrics, /v1/models, /tokenize
guard            the outermost layer: keys, allowed hosts, the client's address
completions      POST /v1/completions
chat             POST /v1/chat/completions
responses_route  /v1/responses
admin            /admin: state of the cluster, and the calls that change it
events           GET /admin/events, which feeds the page
elastic_ep       the scaling calls of vLLM and SGLang
service          what every handler needs: the backend, the tokenizer, readiness
sampling         from a request's fields to SamplingParams
responses        what the two completion APIs share in running a request and writing its response
http_io          errors in OpenAI's form, server-sent events, clients that hang up

Bodies are read in deploy/bodies, prompts made in deploy/text, and tokens come from deploy/generation.
"""
