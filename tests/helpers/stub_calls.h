/* Counts calls by name. Python reads the list `stub_calls` of each library (tests/helpers/cuda_stubs.py). */
#include <stddef.h>

typedef struct Calls { const char *name; long count; struct Calls *next; } Calls;
Calls *stub_calls; /* with -fcommon, one for all files of a library */
#define COUNT(label) do { static Calls calls = {label}; if (!calls.count++) { calls.next = stub_calls; stub_calls = &calls; } } while (0)
#define CALLED COUNT(__func__)
