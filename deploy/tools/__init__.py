"""How a chat uses tools and reasoning: the form of the served model, and the plan of a request."""
