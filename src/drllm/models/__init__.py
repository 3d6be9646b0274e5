"""The frozen base model, and the routing, routers, scoring and exports built on it."""
