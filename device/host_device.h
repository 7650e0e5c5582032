// Marks functions that are compiled for the host and for the device: the same formula on both.
#pragma once

#ifdef __CUDACC__
#define THAW_HOST_DEVICE __host__ __device__
#else
#define THAW_HOST_DEVICE
#endif
