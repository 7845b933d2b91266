// What specfast._core hands to specfast._mlx: a capsule, because modules of two nanobind domains share no types.
#pragma once

#include "model_regions.hpp"

/// The capsule's name; both modules come from one build.
inline constexpr const char* kGraphHandleName = "specfast._core.ModelRegions " SPECFAST_VERSION;

/// What it points to.
using GraphHandle = std::shared_ptr<specfast::ModelRegions>;
