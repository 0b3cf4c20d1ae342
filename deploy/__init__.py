"""The room that deploys sparkmoe: config, Serve application, Fleet, HTTP endpoint and command line.

Only this room knows Ray, HTTP and YAML.
"""
