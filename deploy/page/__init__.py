"""The page that a person sees at `/`: what feeds it, and its static files.

feed     the state that the page shows, as JSON, and the changes from one state to the next; pure
files    serves the static files, under a strict content security policy
static   plain HTML, CSS and JavaScript modules; nothing is built, and nothing is loaded from elsewhere

The stream that carries changes to open pages is deploy/api/events.py.
"""
