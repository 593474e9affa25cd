"""KubeProxyConfiguration files, kube-proxy's flags, defaults and validation: all that leads to `Settings`.

settings    the effective configuration, in the types that the agent uses
load        from flags and a file to it
flags       kube-proxy's flags and ours, as data, and Go's ways to spell them
schema      the fields of both documents, as data
document    a file's text to values by field path, with lines
validate    what values may say
values      the types of values and their textual forms
"""
