"""The version of limbeck, which every manifest holds."""

__version__ = "0.1.0"
