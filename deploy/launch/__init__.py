"""Starting and ending the processes of a server.

serve_app         the Ray Serve application, for `emoe serve` and `serve deploy`
local_ray         starts Ray, Serve and the application for one server, and ends them
ray_environment   the environment of those processes
ray_private       every use of Ray and Serve that their documentation does not promise
haproxy           makes Serve run behind HAProxy
haproxy_config    corrects the configuration that Serve writes for HAProxy
supervisor        the process above the server's, which ends all of them
supervision       the supervisor's decisions
process_tree      keeps a server's processes together, and kills them
run_directory     the private directory of one server
console           the log file, and the lines of it that the user sees
builtin           the built-in model and its traces

`emoe serve` itself is in deploy/cli/serve.py; the actors are started in actors/coordinator.
"""
