"""`sluice bundle`: one archive for a bug report.

`making` writes it, without `secrets`; `reading` takes one in, as far as `checking` admits it; from there the other
verbs answer (`verbs`), about another proxy's rules too (`others`).
"""
