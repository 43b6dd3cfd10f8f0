"""Power meters: what a GPU, a Jetson module or a CPU says of the energy that it takes."""
