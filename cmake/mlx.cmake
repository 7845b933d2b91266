# specfast._mlx: primitives of MLX's graphs, against the C++ library of one mlx version. It calls the kernels through
# specfast._core, so it links neither them nor the stable ABI (which mlx.core, whose arrays it takes, does not use).
if(NOT MLX_ROOT)  # given, with mlx_version, when building for another system
  execute_process(COMMAND "${Python_EXECUTABLE}" -m mlx --cmake-dir
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE MLX_ROOT COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import mlx.core; print(mlx.core.__version__)"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE mlx_version COMMAND_ERROR_IS_FATAL ANY)
endif()
find_package(MLX CONFIG REQUIRED PATHS "${MLX_ROOT}" NO_DEFAULT_PATH)
nanobind_add_module(_mlx NB_STATIC NOMINSIZE NB_DOMAIN mlx
  src/mlx_module.cpp src/mlx_regions.cpp src/mlx_kv.cpp src/mlx_launch.cpp)
target_link_libraries(_mlx PRIVATE mlx)
target_include_directories(_mlx PRIVATE csrc)
target_compile_definitions(_mlx PRIVATE SPECFAST_MLX_VERSION="${mlx_version}")
if(APPLE)
  set(origin @loader_path)
else()
  set(origin $ORIGIN)
endif()
set_target_properties(_mlx PROPERTIES BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "${origin}/../mlx/lib")
install(TARGETS _mlx LIBRARY DESTINATION specfast)
