"""The HTTP server; `limbeck.serve(...)` starts it.

Example:
    from limbeck.serve import ServeConfig, Service, make_app

    app = make_app(Service(ServeConfig(model="tiny-student")))  # an ASGI application
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BenchServeConfig": "bench",
        "LimitsConfig": "config",
        "ServeConfig": "config",
        "Server": "server",
        "Service": "service",
        "make_app": "app",
    },
)
make_callable(__name__)
