/**
 * Put in front of a process with `--preload`, this lets a bench ask for the size of its JavaScript heap: after SIGUSR2,
 * and a collection, it stands in the file `PID.heap` of the folder REPRISE_HEAP.
 */
import { heapStats } from "bun:jsc";
import { renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export interface Heap {
  /** Bytes, what objects hold outside of the heap proper included. */
  size: number;
  objects: number;
  /** How many there are of each kind. */
  kinds: Record<string, number>;
}

/** For the environment of a server, whose workers can then be asked. */
export const heapEnvironment = (folder: string) => ({
  BUN_OPTIONS: `--preload=${import.meta.path}`,
  REPRISE_HEAP: folder,
});

function tell(path: string): void {
  Bun.gc(true);
  const { heapSize, objectCount, objectTypeCounts } = heapStats();
  const heap: Heap = { size: heapSize, objects: objectCount, kinds: objectTypeCounts };
  writeFileSync(`${path}.new`, JSON.stringify(heap));
  renameSync(`${path}.new`, path);
}

const { REPRISE_HEAP: folder } = process.env;
if (folder) process.on("SIGUSR2", () => tell(join(folder, `${process.pid}.heap`)));
