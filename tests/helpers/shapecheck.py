"""The run-time check of the library's annotations, shapes included, while tests run."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is annotated, as for every static type checker.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
