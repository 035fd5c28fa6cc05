"""Names of templates enter; what renders them leaves."""

import jinja2


def environment(escaped: bool, strict: bool = True) -> jinja2.Environment:
    """Of the templates of this package. escaped: what they show is text in HTML; else they write Markdown. strict: a
    name that a template was not given is an error; else it shows nothing."""
    loader = jinja2.PackageLoader("mpo_jax.evaluation", "templates")
    undefined = jinja2.StrictUndefined if strict else jinja2.Undefined
    return jinja2.Environment(
        loader=loader, autoescape=escaped, trim_blocks=True, lstrip_blocks=True, undefined=undefined
    )
