"""Several devices and processes: the mesh, what is laid out how over it, one fate for all."""
