"""How a graph is read: data flow, roles, surroundings and measured shapes behind the LinearLayer view."""
