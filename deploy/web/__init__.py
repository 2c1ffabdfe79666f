"""What the server owes to browsers, proxies and tools, whatever its calls do: methods, CORS, and the description of
the calls."""
