// How many threads OpenMP has.
//
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

// The calling thread gets no team: what it computes, it computes itself. Teams of several threads together are more threads
// than processors, and none of them spins any more.
extern "C" void specforge_compute_alone() {
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
}
