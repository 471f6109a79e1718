/**
 * Who reads from the cluster of cluster.ts, meanwhile: files that nobody changes, which must always be had, from any server
 * of the list that answers. How long that took at the most is a figure and no more: the machine has a part in it.
 */
import { Remote } from "../../client.ts";
import type { Meta } from "../../protocol.ts";
import { parseServers } from "../../remote.ts";
import type { Target } from "../../resume.ts";
import { randomBytes } from "../fixtures.ts";
import type { World } from "./writers.ts";

const FILES = 20;
const MOST_BYTES = 100_000;
const BETWEEN_MS = 20;
/** A server that is stopped is given up after that, and the next of the list is asked. */
const TIMEOUT_MS = 2_000;
/** A read goes on until it has what it wants. */
const RETRIES = 1_000;

/** It is told what such a read has waited for. */
const LONG_MS = 3_000;

const pathOf = (index: number) => `unchanged/${index}`;
const contentOf = (index: number) => randomBytes(1 + Math.floor((index * MOST_BYTES) / FILES), index + 1);

export function filesToRead(): Record<string, Uint8Array> {
  return Object.fromEntries(Array.from({ length: FILES }, (_, index) => [pathOf(index), contentOf(index)]));
}

export class Reader {
  readonly #world: World;
  readonly #number: number;

  constructor(world: World, number: number) {
    this.#world = world;
    this.#number = number;
  }

  async run(): Promise<void> {
    const world = this.#world;
    let doneAt = performance.now();
    for (let turn = this.#number; !world.isOver(); turn++) {
      const notes: string[] = [];
      await this.#read(turn % FILES, (text) => notes.push(`${Math.round(performance.now() - doneAt)} ms: ${text}`));
      const now = performance.now();
      if (now - doneAt > LONG_MS) world.say(`a read took ${Math.round(now - doneAt)} ms\n  ${notes.join("\n  ")}`);
      world.paused(now - doneAt);
      doneAt = now;
      await Bun.sleep(BETWEEN_MS);
    }
  }

  /** As another client each time. */
  async #read(index: number, note: (text: string) => void): Promise<void> {
    const servers = parseServers([...this.#world.addresses.values()].join());
    const first = this.#number % servers.length;
    const turned = [...servers.slice(first), ...servers.slice(0, first)];
    const remote = new Remote({ servers: turned, timeoutMs: TIMEOUT_MS, retries: RETRIES, note });
    const target = new Memory();
    try {
      await remote.download(pathOf(index), target);
      if (!target.content.equals(contentOf(index))) this.#world.fault(`${pathOf(index)} was read as something else`);
      this.#world.count("reads");
    } catch (error) {
      this.#world.fault(`${pathOf(index)} cannot be read: ${error}`);
    } finally {
      remote.close();
    }
  }
}

class Memory implements Target {
  readonly end = undefined;
  readonly restartable = true;
  etag = "";
  content = Buffer.alloc(0);

  get bytes(): number {
    return this.content.length;
  }
  begin({ etag }: Meta): void {
    this.etag = etag;
  }
  async append(chunk: Uint8Array, _crc32: number, free: (chunk: Uint8Array) => void): Promise<void> {
    this.content = Buffer.concat([this.content, chunk]);
    free(chunk);
  }
  async settle(): Promise<void> {}
  reset(): void {
    this.etag = "";
    this.content = Buffer.alloc(0);
  }
}
