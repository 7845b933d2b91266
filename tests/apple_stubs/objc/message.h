#pragma once
#include <objc/runtime.h>
extern "C" void objc_msgSend(), objc_msgSend_fpret(), objc_msgSend_stret();
