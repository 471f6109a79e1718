/**
 * Members of a cluster that lose messages, crash and are parted, from seeds: when the faults stop, all trees are equal and
 * nothing that was written is lost. More seeds, or others: `REPRISE_SEEDS=100000 REPRISE_FROM=1 bun test simulation`.
 */
import { expect, test } from "bun:test";
import { type Outcome, simulate } from "./simulation.ts";

const SEEDS = Number(process.env.REPRISE_SEEDS ?? 10_000);
const FROM = Number(process.env.REPRISE_FROM ?? 1);
const TEST_MS = 600_000;

test(
  `simulate() all trees are equal, and nothing is lost (${SEEDS} seeds)`,
  () => {
    const outcomes = Array.from({ length: SEEDS }, (_, index) => simulate(FROM + index));
    expect(outcomes.filter(({ problems }) => problems.length > 0).map(describe)).toEqual([]);
    // Where nothing happens nothing can go wrong.
    expect(mean(outcomes, "records")).toBeGreaterThan(15);
    expect(mean(outcomes, "steps")).toBeGreaterThan(100);
    expect(mean(outcomes, "copies")).toBeGreaterThan(0.5);
  },
  TEST_MS,
);

test("simulate() the same from the same seed", () => {
  const [first, second]: string[][] = [[], []];
  simulate(42, (line) => first!.push(line));
  simulate(42, (line) => second!.push(line));
  expect(first!.length).toBeGreaterThan(50);
  expect(second).toEqual(first!);
});

function describe({ seed, problems }: Outcome): string {
  return `bun tests/simulation.ts --seed ${seed}: ${problems.slice(0, 3).join("; ")}`;
}

function mean(outcomes: Outcome[], of: "records" | "steps" | "copies"): number {
  return outcomes.reduce((sum, outcome) => sum + outcome[of], 0) / outcomes.length;
}
