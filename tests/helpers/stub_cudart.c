/* libcudart.so.13 without a GPU: one device whose memory is the process's, and kernels that do nothing. With it the real
 * CUDA provider of ONNX Runtime opens sessions, and shows what it launches, copies and waits for (tests/reality/).
 * What is not here is made by cuda_stubs.py: it returns success. */
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "stub_calls.h"

/* A thread that captures may not wait or allocate: such a call fails, and so does the capture. */
static int in_capture(void) {
  int *capturing = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "stub_capturing"); /* this thread's */
  return capturing && *capturing;
}
static int refused(void) {
  int *capturing = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "stub_capturing"); /* this thread's */
  return capturing && *capturing ? *capturing = 2 : 0;
}
#define NOT_IN_CAPTURE do { if (refused()) { COUNT("refused in a capture"); return cudaErrorStreamCaptureUnsupported; } } while (0)

static void *handle(void) { static char *last = (char *)0x5000; return last += 16; }

cudaError_t cudaGetDeviceCount(int *count) { *count = 2; return 0; }
static __thread int device;
cudaError_t cudaGetDevice(int *found) { *found = device; return 0; }
cudaError_t cudaSetDevice(int chosen) { device = chosen; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *all, int which) {
  memset(all, 0, sizeof *all);
  strcpy(all->name, "stub H100");
  all->major = 9;
  all->totalGlobalMem = 80ull << 30;
  all->multiProcessorCount = 132;
  all->warpSize = 32;
  all->maxThreadsPerBlock = all->maxThreadsDim[0] = all->maxThreadsDim[1] = 1024;
  all->maxThreadsDim[2] = 64;
  all->maxThreadsPerMultiProcessor = 2048;
  all->sharedMemPerBlock = 49152;
  all->sharedMemPerBlockOptin = 232448;
  all->sharedMemPerMultiprocessor = 233472;
  all->maxGridSize[0] = 2147483647;
  all->maxGridSize[1] = all->maxGridSize[2] = 65535;
  all->regsPerBlock = 65536;
  all->l2CacheSize = 50 << 20;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  switch ((int)which) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: *value = 1;
  }
  return 0;
}

cudaError_t cudaMalloc(void **to, size_t size) { NOT_IN_CAPTURE; CALLED; *to = memory(size); return 0; }
cudaError_t cudaMallocFromPoolAsync(void **to, size_t size, cudaMemPool_t pool, cudaStream_t stream) { CALLED; *to = memory(size); return 0; }
cudaError_t cudaFree(void *what) { NOT_IN_CAPTURE; CALLED; release(what); return 0; }
cudaError_t cudaFreeAsync(void *what, cudaStream_t stream) { CALLED; release(what); return 0; }
cudaError_t cudaHostAlloc(void **to, size_t size, unsigned flags) { NOT_IN_CAPTURE; CALLED; *to = memory(size); return 0; }
cudaError_t cudaMallocHost(void **to, size_t size) { NOT_IN_CAPTURE; CALLED; *to = memory(size); return 0; }
cudaError_t cudaFreeHost(void *what) { NOT_IN_CAPTURE; CALLED; release(what); return 0; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = 79ull << 30; *total = 80ull << 30; return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { NOT_IN_CAPTURE; CALLED; return 0; }
cudaError_t cudaDeviceSynchronize(void) { NOT_IN_CAPTURE; CALLED; return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { NOT_IN_CAPTURE; CALLED; return 0; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { NOT_IN_CAPTURE; CALLED; function(data); return 0; }
cudaError_t cudaMemset(void *what, int value, size_t size) { CALLED; memset(what, value, size); return 0; }
cudaError_t cudaMemsetAsync(void *what, int value, size_t size, cudaStream_t stream) { CALLED; memset(what, value, size); return 0; }
cudaError_t cudaMemcpy(void *to, const void *of, size_t size, enum cudaMemcpyKind kind) { NOT_IN_CAPTURE; CALLED; memmove(to, of, size); return 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *of, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) COUNT("cudaMemcpyAsync to the device");
  else if (kind == cudaMemcpyDeviceToHost) COUNT("cudaMemcpyAsync to the host");
  else COUNT("cudaMemcpyAsync on the device");
  memmove(to, of, size);
  return 0;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *of, size_t of_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  CALLED;
  for (size_t row = 0; row < rows; row++) memmove((char *)to + row * to_pitch, (const char *)of + row * of_pitch, width);
  return 0;
}

cudaError_t cudaStreamCreate(cudaStream_t *made) { *made = handle(); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *made, unsigned flags) { *made = handle(); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *made) { *made = handle(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) { *made = handle(); return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = in_capture() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
const char *cudaGetErrorString(cudaError_t error) { return "an error of the stub"; }
const char *cudaGetErrorName(cudaError_t error) { return "stubError"; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *all, const void *what) {
  memset(all, 0, sizeof *all);
  all->type = cudaMemoryTypeDevice;
  all->devicePointer = (void *)what;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *found = 0;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return 0;
}

void **__cudaRegisterFatBinary(void *binary) { static void *registered[8]; return registered; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *all, const void *kernel) {
  memset(all, 0, sizeof *all);
  all->maxThreadsPerBlock = 1024;
  all->binaryVersion = all->ptxVersion = 90;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int threads, size_t shared, unsigned flags) {
  *count = 2;
  return 0;
}
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t *)stream = pushed.stream;
  return 0;
}
cudaError_t __cudaGetKernel(void **found, const void *kernel) { *found = (void *)kernel; return 0; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) { COUNT("kernel"); return 0; }
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) { COUNT("kernel"); return 0; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **given) { COUNT("kernel"); return 0; }
