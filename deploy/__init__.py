"""The only room that knows Ray, HTTP and YAML."""
