// Functions of vectors, compiled once for each generation of processors and chosen when the program starts.

#pragma once

#if defined(__x86_64__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
