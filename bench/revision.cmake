# Writes revision.h if the checked out revision has changed; run at every build of the benchmarks.
#   cmake -DSOURCE_DIR=... -DHEADER=... -P revision.cmake
execute_process(
  COMMAND git -C ${SOURCE_DIR} describe --always --dirty --abbrev=12
  OUTPUT_VARIABLE revision
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
  RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  set(revision "unknown")
endif()
file(CONFIGURE OUTPUT ${HEADER} CONTENT "#define PROXYATTN_BENCH_REVISION \"${revision}\"\n")
