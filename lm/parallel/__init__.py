"""Several devices and processes: the mesh, layouts over it, and how processes end together."""
