"""The client without Ray: what applications call, and how requests find their way."""
