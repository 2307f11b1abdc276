/* Counts calls by name. Python reads the list `stub_calls` of each library (tests/helpers/cuda_stubs.py). */
#include <stddef.h>

typedef struct Calls { const char *name; long count; struct Calls *next; } Calls;
Calls *stub_calls; /* with -fcommon, one for all files of a library */
#define COUNT(label) do { static Calls calls = {label}; if (!calls.count++) { calls.next = stub_calls; stub_calls = &calls; } } while (0)
#define CALLED COUNT(__func__)

/* Memory that is zero until it is written, and takes none before: garbage might be no numbers. The page before it holds
 * its size. */
#include <sys/mman.h>
static void *memory(size_t size) {
  char *page = mmap(0, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *(size_t *)page = size + 4096;
  return page + 4096;
}
static void release(void *address) {
  char *page = (char *)address - 4096;
  if (address) munmap(page, *(size_t *)page);
}
