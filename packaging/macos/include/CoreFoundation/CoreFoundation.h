// The few names Metal's C++ headers take from Apple's framework.
#pragma once
#include <TargetConditionals.h>
#include <stddef.h>
#include <stdint.h>
typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
