// A team of OpenMP threads that does nothing and whose being there matters: while libgomp has more threads than the
// process has processors, threads that wait for others spin for 100 rounds instead of 300 000 before they sleep.

#ifdef _OPENMP
#include <omp.h>
#endif

// Starts the calling thread's own team, one more than there are processors, and returns its size: 0 without OpenMP. The
// team sleeps, and ends with the calling thread.
extern "C" int specforge_crowd() {
  int size = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(omp_get_num_procs() + 1)
#pragma omp atomic
  ++size;
#endif
  return size;
}
