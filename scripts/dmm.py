"""The webuis' entry, for a clone in extensions/. All is imported at once: A1111 has the clone on sys.path only now."""

from a1111_extension.script import DMMScript, register

__all__ = ["DMMScript"]
register()
