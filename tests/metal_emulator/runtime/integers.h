// Metal's integer types, for what is executed and for the lint. No standard header defines them, as its names would meet Metal's.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#ifndef __CUDACC_RTC__  // has its own
typedef unsigned long size_t;
#endif

namespace metal {
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
}  // namespace metal
