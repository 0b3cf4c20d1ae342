"""The room that deploys sparkmoe: configs, the Serve application, the Fleet, the HTTP endpoint and the
command line.

Only this room knows Ray, HTTP and YAML.
"""
