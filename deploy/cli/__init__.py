"""The command `emoe`.

entry        where the command begins; Ctrl-C is no traceback
main         the parser, which is made from ServeConfig, and the exit codes
serve        `emoe serve`
plan         flags of `emoe plan`, `evaluate`, `compare` and `simulate`
plan_input   from those flags to traces, workers and problems
plan_verbs   `emoe plan` and `emoe evaluate`
compare      `emoe compare` and `emoe simulate`
trace        `emoe trace`
top          `emoe top`
top_look     one look at a server, as values
top_view     from looks to the text that is drawn

The work itself is in deploy/launch (serve), optimizer/ (plans) and model/ (traces).
"""
