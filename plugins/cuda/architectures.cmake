# To be included before CUDA is enabled.
# All that the toolkit at hand knows: 87 is Jetson Orin; 100 and 120 came with CUDA 12.8. Newer GPUs take the last one's PTX.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 87-real 89-real 90-real 100-real 120)
endif()
