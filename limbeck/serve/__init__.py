"""The HTTP server; `limbeck.serve(...)` starts it.

Example:
    from limbeck.serve import Gate, ServeConfig, Service, make_app

    config = ServeConfig(model="tiny-student")
    app = Gate(make_app(Service(config)), config)  # an ASGI application
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BenchServeConfig": "bench",
        "Gate": "gate",
        "LimitsConfig": "config",
        "ServeConfig": "config",
        "Server": "server",
        "Service": "service",
        "make_app": "app",
    },
)
make_callable(__name__)
