/* libcuda.so.1 without a GPU: two devices whose memory is the process's, and whose work is done when it is asked for.
 * With it the real cuda.bindings are called with the real arguments; see tests/runtime/devices/cuda/test_bindings.py.
 * Calls refuse what a driver would refuse: no current context, unknown handles, other flags than those that are meant. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "stub_calls.h"

typedef int Result;
typedef uint64_t Address;
typedef void *Handle;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 101, INVALID_CONTEXT = 201, PTX = 218 };
enum { NOT_FOUND = 500, NOT_READY = 600, PEER_ENABLED = 704, CAPTURE_INVALIDATED = 901 };

static __thread Handle current;
#define NEEDS_CONTEXT if (!current) return INVALID_CONTEXT
#define REFUSE_IF(condition) if (condition) return INVALID_VALUE

typedef struct { float *x, *y, a, b; unsigned count; } Kernel;
static __thread Kernel captured[64];
static __thread int captures = -1; /* how many are captured; -1: none is under way */
static __thread Handle capturing;
__thread int stub_capturing; /* 1: this thread captures; 2: and has made a call that ends it (stub_cudart.c) */

static Result made(Handle *handle, uintptr_t kind) { static int count; *handle = (Handle)(kind + ++count); return SUCCESS; }

Result cuInit(unsigned flags) { return SUCCESS; }
#ifndef DRIVER_CUDA
#define DRIVER_CUDA 13000
#endif
Result cuDriverGetVersion(int *version) { *version = DRIVER_CUDA; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 2; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 2 ? SUCCESS : NO_DEVICE; }
Result cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "stub %d", device); return SUCCESS; }
Result cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return SUCCESS; }
Result cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = (Handle)(uintptr_t)(0x1000 + device); return SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
Result cuCtxSetCurrent(Handle context) { current = context; return SUCCESS; }
Result cuCtxGetCurrent(Handle *context) { *context = current; return SUCCESS; }

Result cuMemAlloc_v2(Address *address, size_t size) { CALLED;
  NEEDS_CONTEXT;
  if (size > 1ull << 40) return OUT_OF_MEMORY;
  *address = (Address)memory(size);
  return SUCCESS;
}
Result cuMemFree_v2(Address address) { NEEDS_CONTEXT; release((void *)address); return SUCCESS; }
Result cuMemHostAlloc(void **address, size_t size, unsigned flags) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(flags != 1); /* portable */
  *address = memory(size);
  return SUCCESS;
}
Result cuMemFreeHost(void *address) { NEEDS_CONTEXT; release(address); return SUCCESS; }

Result cuStreamCreate(Handle *stream, unsigned flags) { NEEDS_CONTEXT; REFUSE_IF(flags != 1); return made(stream, 0x50000); }
Result cuStreamDestroy_v2(Handle stream) { NEEDS_CONTEXT; REFUSE_IF(!stream); return SUCCESS; }
Result cuStreamSynchronize(Handle stream) { CALLED; NEEDS_CONTEXT; REFUSE_IF(!stream); return SUCCESS; }
Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
  NEEDS_CONTEXT;
  REFUSE_IF(!stream || !event || flags);
  return SUCCESS;
}
Result cuEventCreate(Handle *event, unsigned flags) { NEEDS_CONTEXT; REFUSE_IF(flags); return made(event, 0x90000); }
Result cuEventDestroy_v2(Handle event) { NEEDS_CONTEXT; REFUSE_IF(!event); return SUCCESS; }
/* Work is done when it is asked for, so an event happens when it is recorded. */
static double *happened_ms(Handle event) { static double ms[1 << 16]; return &ms[(uintptr_t)event & 0xffff]; }
Result cuEventRecord(Handle event, Handle stream) {
  NEEDS_CONTEXT;
  REFUSE_IF(!stream || !event);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *happened_ms(event) = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  return SUCCESS;
}
Result cuEventQuery(Handle event) {
  static int asked;
  NEEDS_CONTEXT;
  REFUSE_IF(!event);
  return ++asked % 3 ? SUCCESS : NOT_READY;
}
Result cuEventSynchronize(Handle event) { CALLED; NEEDS_CONTEXT; REFUSE_IF(!event); return SUCCESS; }
Result cuEventElapsedTime_v2(float *ms, Handle began, Handle ended) {
  REFUSE_IF(!*happened_ms(began) || !*happened_ms(ended));
  *ms = *happened_ms(ended) - *happened_ms(began);
  return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *of, size_t size, Handle stream) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(!stream);
  memcpy((void *)to, of, size);
  return SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void *to, Address of, size_t size, Handle stream) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(!stream);
  memcpy(to, (void *)of, size);
  return SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address of, size_t size, Handle stream) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(!stream);
  memmove((void *)to, (void *)of, size);
  return SUCCESS;
}
Result cuMemcpyPeerAsync(Address to, Handle here, Address of, Handle there, size_t size, Handle stream) {
  NEEDS_CONTEXT;
  REFUSE_IF(!stream || here != current || here == there);
  memcpy((void *)to, (void *)of, size);
  return SUCCESS;
}
typedef struct { /* CUDA_MEMCPY2D */
  size_t of_x, of_y; int of_type; const void *of_host; Address of; Handle of_array; size_t of_pitch;
  size_t to_x, to_y; int to_type; void *to_host; Address to; Handle to_array; size_t to_pitch;
  size_t width, rows;
} Copy2D;
Result cuMemcpy2DAsync_v2(const Copy2D *copy, Handle stream) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(!stream || copy->of_type != 2 || copy->to_type != 2 || copy->of_pitch < copy->width);
  for (size_t row = 0; row < copy->rows; row++)
    memmove((void *)(copy->to + row * copy->to_pitch), (void *)(copy->of + row * copy->of_pitch), copy->width);
  return SUCCESS;
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t size, Handle stream) {
  NEEDS_CONTEXT;
  REFUSE_IF(!stream);
  memset((void *)to, value, size);
  return SUCCESS;
}
Result cuDeviceCanAccessPeer(int *can, int device, int other) { *can = device != other; return SUCCESS; }
Result cuCtxEnablePeerAccess(Handle context, unsigned flags) {
  NEEDS_CONTEXT;
  REFUSE_IF(context == current || flags);
  return PEER_ENABLED; /* as for a process that has enabled it before */
}

static void run(const Kernel *kernel) {
  for (unsigned i = 0; i < kernel->count; i++) kernel->y[i] = kernel->a * kernel->x[i] + kernel->b;
}
Result cuModuleLoadData(Handle *module, const void *image) {
  NEEDS_CONTEXT;
  return strncmp(image, "\n.version", 9) ? PTX : made(module, 0x20000);
}
Result cuModuleUnload(Handle module) { NEEDS_CONTEXT; return SUCCESS; }
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) {
  return strcmp(name, "scale") ? NOT_FOUND : made(function, 0x30000);
}
Result cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, Handle stream, void **given, void **extra) {
  NEEDS_CONTEXT;
  Kernel kernel = {*(float **)given[0], *(float **)given[1], *(float *)given[2], *(float *)given[3],
                   *(unsigned *)given[4]};
  REFUSE_IF(!stream || (uint64_t)grid_x * block_x < kernel.count || grid_y * grid_z * block_y * block_z != 1);
  if (captures >= 0 && stream == capturing) captured[captures++] = kernel;
  else run(&kernel);
  return SUCCESS;
}
Result cuStreamBeginCapture_v2(Handle stream, int mode) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(mode != 1); /* of this thread */
  capturing = stream;
  captures = 0;
  stub_capturing = 1;
  return SUCCESS;
}
static __thread int graph_size;
Result cuStreamEndCapture(Handle stream, Handle *graph) {
  NEEDS_CONTEXT;
  REFUSE_IF(stream != capturing);
  graph_size = captures;
  captures = -1;
  int invalidated = stub_capturing == 2;
  stub_capturing = 0;
  if (invalidated) return CAPTURE_INVALIDATED;
  return made(graph, 0x70000);
}
Result cuGraphInstantiateWithFlags(Handle *executable, Handle graph, unsigned long long flags) {
  NEEDS_CONTEXT;
  REFUSE_IF(!graph || flags);
  return made(executable, 0x80000);
}
Result cuGraphDestroy(Handle graph) { NEEDS_CONTEXT; REFUSE_IF(!graph); return SUCCESS; }
Result cuGraphExecDestroy(Handle executable) { NEEDS_CONTEXT; REFUSE_IF(!executable); return SUCCESS; }
Result cuGraphLaunch(Handle executable, Handle stream) { CALLED;
  NEEDS_CONTEXT;
  REFUSE_IF(!executable || !stream);
  for (int i = 0; i < graph_size; i++) run(&captured[i]);
  return SUCCESS;
}

/* How the bindings find all of these: by the name without its version. */
Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  const char *ends[] = {"_v2", "", "WithFlags"};
  char full[128];
  void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = NULL;
  for (int i = 0; i < 3 && !*function; i++) {
    snprintf(full, sizeof full, "%s%s", name, ends[i]);
    *function = dlsym(self, full);
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
