"""Launchers: absl flags in, one call into bmjax."""
