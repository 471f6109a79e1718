/**
 * Who may connect, counted over all workers: connections in all, connections of an address, failed tokens of an address.
 *
 * The supervisor counts (`Admission`), and each worker asks it (`Gate`) over the channel between them, once for each
 * connection: a count in each worker would only be right if the kernel spread connections evenly. What a worker held that
 * died is forgotten with it.
 */

/** The wait before a failure is answered: this after the first, twice as long after each further one, up to the last. */
const FIRST_DELAY_MS = 100;
const LAST_DELAY_MS = 10_000;
/** An address that has not failed for so long begins anew. */
const FORGET_MS = 600_000;
/** Addresses whose failures are remembered; the longest known goes first. */
const MAX_FAILED_ADDRESSES = 10_000;

/** What an address is told: come in, there are too many, or too many of you. */
export type Verdict = "welcome" | "full" | "full_for_address";

export interface AdmissionLimits {
  maxConnections: number;
  /** 0 for no limit. */
  maxPerAddress: number;
}

/** From a worker to the supervisor. */
export type Question =
  | { kind: "enter"; id: number; address: string }
  | { kind: "leave"; address: string }
  | { kind: "failed"; id: number; address: string };
/** And back. */
export interface Reply {
  id: number;
  reply: Verdict | number;
}

export class Admission {
  readonly #limits: AdmissionLimits;
  /** Connections by worker and address. */
  readonly #held = new Map<number, Map<string, number>>();
  readonly #ofAddress = new Map<string, number>();
  #all = 0;
  readonly #failures = new Map<string, { count: number; at: number }>();
  /** Milliseconds. */
  readonly #now: () => number;

  constructor(limits: AdmissionLimits, now: () => number = () => performance.now()) {
    this.#limits = limits;
    this.#now = now;
  }

  /** Answers what a worker asks, if there is something to answer. */
  answer(worker: number, question: Question): Reply | undefined {
    const key = keyOf(question.address);
    switch (question.kind) {
      case "enter":
        return { id: question.id, reply: this.#enter(worker, key) };
      case "leave":
        this.#add(worker, key, -1);
        return undefined;
      case "failed":
        return { id: question.id, reply: this.#delayAfter(key) };
    }
  }

  /** A worker died, and its connections with it. */
  forget(worker: number): void {
    for (const [key, count] of this.#held.get(worker) ?? []) this.#add(worker, key, -count);
    this.#held.delete(worker);
  }

  #enter(worker: number, key: string): Verdict {
    const { maxConnections, maxPerAddress } = this.#limits;
    if (maxPerAddress > 0 && (this.#ofAddress.get(key) ?? 0) >= maxPerAddress) return "full_for_address";
    if (this.#all >= maxConnections) return "full";
    this.#add(worker, key, 1);
    return "welcome";
  }

  #add(worker: number, key: string, count: number): void {
    const held = this.#held.get(worker) ?? new Map<string, number>();
    this.#held.set(worker, held);
    for (const counts of [held, this.#ofAddress]) {
      const sum = (counts.get(key) ?? 0) + count;
      if (sum > 0) counts.set(key, sum);
      else counts.delete(key);
    }
    this.#all += count;
  }

  /** Counts a failure and tells how long its answer is to wait, in milliseconds. */
  #delayAfter(key: string): number {
    const now = this.#now();
    const known = this.#failures.get(key);
    const count = known && now - known.at < FORGET_MS ? known.count + 1 : 1;
    this.#failures.delete(key);
    this.#failures.set(key, { count, at: now });
    if (this.#failures.size > MAX_FAILED_ADDRESSES) this.#failures.delete(this.#failures.keys().next().value!);
    return Math.min(LAST_DELAY_MS, FIRST_DELAY_MS * 2 ** (count - 1));
  }
}

/** The worker's side. */
export class Gate {
  readonly #ask: (question: Question) => void;
  readonly #waiting = new Map<number, (reply: Verdict | number) => void>();
  #last = 0;

  constructor(ask: (question: Question) => void) {
    this.#ask = ask;
  }

  /** Whoever is welcome must `leave`. */
  enter(address: string): Promise<Verdict> {
    return this.#answerTo<Verdict>({ kind: "enter", address });
  }

  leave(address: string): void {
    this.#ask({ kind: "leave", address });
  }

  /** Milliseconds to wait before the failure is answered. */
  failed(address: string): Promise<number> {
    return this.#answerTo<number>({ kind: "failed", address });
  }

  onReply({ id, reply }: Reply): void {
    this.#waiting.get(id)?.(reply);
    this.#waiting.delete(id);
  }

  #answerTo<T extends Verdict | number>(question: { kind: "enter" | "failed"; address: string }): Promise<T> {
    const id = ++this.#last;
    this.#ask({ ...question, id });
    return new Promise<T>((resolve) => this.#waiting.set(id, resolve as (reply: Verdict | number) => void));
  }
}

/** One who has an IPv6 network has 2^64 addresses: the network is what is counted. */
function keyOf(address: string): string {
  const v4 = /^(?:::ffff:)?(\d+\.\d+\.\d+\.\d+)$/i.exec(address)?.[1];
  if (v4 !== undefined || !address.includes(":")) return v4 ?? address;
  const [head, tail] = address.split("::") as [string, string | undefined];
  const before = head === "" ? [] : head.split(":");
  const after = tail === undefined || tail === "" ? [] : tail.split(":");
  const zeros = tail === undefined ? 0 : 8 - before.length - after.length;
  return [...before, ...Array<string>(Math.max(0, zeros)).fill("0"), ...after].slice(0, 4).join(":");
}
