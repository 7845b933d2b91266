#pragma once
#include <cstddef>
#include <cstdint>
struct objc_class { void* isa; };
struct objc_object { objc_class* isa; };
struct objc_selector;
typedef objc_object* id; typedef objc_class* Class; typedef objc_selector* SEL; typedef objc_object Protocol; typedef bool BOOL; typedef void (*IMP)();
extern "C" { SEL sel_registerName(const char*); void* objc_lookUpClass(const char*); void* objc_getProtocol(const char*); Class object_getClass(id); BOOL class_addMethod(Class, SEL, IMP, const char*); }
