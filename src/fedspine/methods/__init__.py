def all_methods() -> dict[str, type]:
    """Every method by name; a new file in `fedspine.methods` is found without being listed anywhere."""
    import fedspine.methods

    for module in pkgutil.iter_modules(fedspine.methods.__path__):
        importlib.import_module(f"fedspine.methods.{module.name}")
    return dict(sorted(_METHODS.items()))


def find(name: str) -> type[Any]:
    """The method called `name`; BadInput names the nearest one otherwise."""
    methods = all_methods()
    if name not in methods:
        raise unknown("method", name, methods)
    return methods[name]
