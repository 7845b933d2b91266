// The one name Metal's C++ headers take from Apple's framework.
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
