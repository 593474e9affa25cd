"""KubeProxyConfiguration files, kube-proxy's flags, defaults and validation: all that leads to `Settings`.

    flags ──────────────┐
                        ├─▶ merge ─▶ validate ─▶ load ─▶ Settings ─▶ the agent
    file ─▶ document ───┘                                   ▲
                                                            └── watching: the file changes

settings    the effective configuration, in the types that the agent uses
load        from flags and a file to it, with what the user should know
schema      the fields of both documents, as data: types, defaults, which are live
flags       kube-proxy's flags and ours, as data, and Go's ways to spell them
gates       kube-proxy's feature gates, as data
document    a file's text to values by field path, with lines
merge       defaults, file and flags in one, each value with its origin
validate    what values may say
values      the types of values and their textual forms
printed     the configuration as /configz, `sluice config` and --write-config-to show it
watching    changes of the file, and which of them a running agent takes on
errors      what is raised
"""
