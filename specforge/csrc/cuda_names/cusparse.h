// Stands in for NVIDIA's header of this name where that is not installed: libtorch's headers name these types and nothing
// here uses them. The real one, where the compiler finds it, comes first.

#pragma once

typedef struct cusparseContext *cusparseHandle_t;
enum cusparseStatus_t : int;
